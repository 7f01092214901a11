"""Emoji as a data set: pictures of three styles, composed into scenes with captions in words."""

from dalle1.data.emoji.dataset import (
    HELD_OUT_SPLITS,
    SPLITS,
    EmojiDataset,
    EmojiSample,
    Piece,
    Scene,
    write_shards,
)
from dalle1.data.emoji.judge import EmojiJudge, Judgement
from dalle1.data.emoji.sources import STYLES, Emoji, Style, read_emoji

__all__ = [
    "HELD_OUT_SPLITS",
    "SPLITS",
    "STYLES",
    "Emoji",
    "EmojiDataset",
    "EmojiJudge",
    "EmojiSample",
    "Judgement",
    "Piece",
    "Scene",
    "Style",
    "read_emoji",
    "write_shards",
]
