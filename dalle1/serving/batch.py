"""One batch: candidates of one or several jobs that are drawn at once.

Dimensions: b candidates, m image positions.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence

from torch import Tensor

from dalle1.generation.batches import CaptionImages
from dalle1.generation.images import decode, decode_rows
from dalle1.generation.ranking import best_images
from dalle1.generation.shares import BatchTooLarge, Share, ShareDrawer
from dalle1.model import Model
from dalle1.sampling import Preview, make_result
from dalle1.serving.jobs import Drawing
from dalle1.serving.requests import NothingComplete

LOG = logging.getLogger(__name__)


class _AllGone(Exception):
    """Nobody waits for the batch any more."""


class Batch:
    """Shares of jobs that have a model, options and first image tokens in common."""

    def __init__(self, model: Model, shares: Mapping[Drawing, Sequence[Share]]) -> None:
        self.model = model
        self.shares = shares

    def __len__(self) -> int:
        """Candidates."""
        return sum(len(share) for shares in self.shares.values() for share in shares)

    def draw(self, drawer: ShareDrawer) -> bool:
        """Draws the batch, and ends the jobs that are complete by it; whether it was drawn.

        A job that is cancelled or stopped meanwhile ends with the token row. Where memory runs
        out, nothing has changed but the drawer's limit. After any other error, a job alone has
        failed, and several will be drawn alone.
        """
        prefix = next(iter(self.shares)).prefix
        every = [share for shares in self.shares.values() for share in shares]
        try:
            tokens = drawer.draw(every, prefix, self._on_row)
        except (BatchTooLarge, _AllGone):
            return False
        except Exception as error:
            for drawing in self.shares:
                if len(self.shares) == 1:
                    fail(drawing, error)
                drawing.alone = True
            return False
        for drawing, own in self._by_job(tokens):
            if not drawing.job.done:
                self._keep(drawing, own)
        return True

    def _by_job(self, tokens: Sequence[Tensor]) -> list[tuple[Drawing, Sequence[Tensor]]]:
        """The tokens of each share, by the job that they are of."""
        found, first = [], 0
        for drawing, shares in self.shares.items():
            found.append((drawing, tokens[first : first + len(shares)]))
            first += len(shares)
        return found

    def _on_row(self, done: int, tokens: Sequence[Tensor]) -> None:
        """A row of the grid is drawn; `done` positions are, in each share's tokens [b, m]."""
        for drawing, own in self._by_job(tokens):
            if drawing.job.stopping:
                conclude(drawing, self.model)
            if drawing.job.done:
                continue
            try:
                self._tell(drawing, done, own)
            except Exception as error:
                fail(drawing, error)
        if all(drawing.job.done for drawing in self.shares):
            raise _AllGone

    def _tell(self, drawing: Drawing, done: int, tokens: Sequence[Tensor]) -> None:
        """Tells a job's client how far it is, and shows the rows."""
        job, (rows, columns) = drawing.job, self.model.prior.grid
        total = len(job.draw.captions) * job.draw.candidates
        complete = total - drawing.remaining + sum(map(len, tokens)) * done / (rows * columns)
        job.advance(complete / total)
        every, row = job.request.preview_rows, done // columns
        if every is None or (row % every and row != rows):
            return
        for share, own in zip(self.shares[drawing], tokens, strict=True):
            shown = own[: self._shown(drawing, share)]
            if len(shown):
                images = decode_rows(self.model.codec, shown, row, self.model.prior.grid)
                job.show(Preview(share.caption, share.candidates.start, row, images))

    def _shown(self, drawing: Drawing, share: Share) -> int:
        """How many of a share's candidates a preview shows."""
        most = drawing.job.request.preview_images
        return (
            len(share)
            if most is None
            else max(0, drawing.job.draw.first + most - share.candidates.start)
        )

    def _keep(self, drawing: Drawing, tokens: Sequence[Tensor]) -> None:
        """Adds drawn candidates to their job, which ends where these are its last ones."""
        job = drawing.job
        try:
            for share, own in zip(self.shares[drawing], tokens, strict=True):
                drawing.tokens.append(own.clone())  # not a view, which would hold the whole batch
                if share.candidates.stop == job.draw.first + job.draw.candidates:
                    keep_best(drawing, self.model)
            if len(drawing.kept) == len(job.draw.captions):
                job.finish(make_result(self.model, job.draw, drawing.kept))
            elif job.stopping:
                conclude(drawing, self.model)
        except Exception as error:
            fail(drawing, error)


def keep_best(drawing: Drawing, model: Model) -> None:
    """Ranks the candidates so far of the caption in progress; the next caption begins."""
    request = drawing.job.draw
    tokens = drawing.take_tokens()
    images = CaptionImages(tokens, decode(model.codec, tokens, model.prior.grid))
    caption = request.captions[len(drawing.kept)]
    drawing.kept.append(best_images(model, model.ranker, caption, images, request))


def conclude(drawing: Drawing, model: Model) -> None:
    """Ends a job that was stopped, with what is complete."""
    job = drawing.job
    if job.done:
        return
    try:
        if drawing.candidates_done >= job.draw.keep:
            keep_best(drawing, model)
        if not drawing.kept:
            count, keep = drawing.candidates_done, job.draw.keep
            raise NothingComplete(f"stopped when {count} of {keep} candidates were complete")
        job.finish(make_result(model, job.draw, drawing.kept))
    except Exception as error:
        fail(drawing, error)


def fail(drawing: Drawing, error: Exception) -> None:
    """Ends a job with an error; the memory of the frames that it came through is given back."""
    if not isinstance(error, ValueError | NothingComplete):
        LOG.error("%r failed", drawing.job, exc_info=error)
    traceback.clear_frames(error.__traceback__)
    drawing.job.fail(error)
