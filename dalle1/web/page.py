"""The page itself: Gradio's components and how they hang together.

The only module that imports Gradio. It decides nothing: what a form means, what is drawn and what
is shown is decided by the other modules, which know nothing of Gradio.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from dalle1.serving.worker import SamplingWorker
from dalle1.web.drawing import View, Visitors, mistake, status
from dalle1.web.fill import Filling, continue_from, fill_from_upload
from dalle1.web.form import FIELDS, Form
from dalle1.web.guard import Guard
from dalle1.web.limits import PageLimits

ASSETS = Path(__file__).parent / "assets"
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONOSPACE = ("ui-monospace", "Menlo", "Consolas", "monospace")
SESSIONS = 256  # visitors whose fields Gradio remembers
TITLE = "<h1>dalle1</h1><p>Pictures from captions, drawn row by row.</p>"
PICTURE = """
<div class="d1-picture"><label class="d1-drop" style="--ratio: ${ratio}">
<input type="file" accept="image/*" aria-label="picture to complete">
<img src="${value}" alt=""><i></i>
<span>Choose, drop or paste a picture. One that was saved here fills in the form, too.</span>
</label><div><p class="d1-said" role="alert"></p>
<button class="d1-remove" type="button">Remove the picture</button></div></div>
"""
Components = dict[str, Any]  # by the names of `Form`, and some more


def mount(
    app: FastAPI, worker: SamplingWorker, path: str = "/", page: PageLimits | None = None
) -> Visitors:
    """Shows the page in an application, at a path of it.

    Args:
        app: not started yet; addresses that it has already stay its own.
        worker: draws. The page offers all of its models, and keeps to its limits.
        page: None: the defaults.

    Returns:
        The page's visitors, and what they draw.
    """
    page = page or PageLimits()
    visitors = Visitors(worker, page)
    gr.mount_gradio_app(
        app,
        build(visitors),
        path,
        allowed_paths=[],
        blocked_paths=["/"],
        show_error=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=1,
        theme=_theme(),
        css=(ASSETS / "page.css").read_text(encoding="utf-8"),
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    letters = worker.limits.captions * worker.limits.letters
    mounted: Any = app.router.routes[-1]
    mounted.app = Guard(mounted.app, page.body_bytes(letters), page.body_seconds)
    return visitors


def build(visitors: Visitors) -> gr.Blocks:
    """The page, without a server."""
    with gr.Blocks(title="dalle1", analytics_enabled=False) as blocks:
        gr.HTML(TITLE, elem_id="d1-title", apply_default_css=False)
        parts = _main_fields(visitors)
        with gr.Accordion("How to draw", open=False, elem_id="d1-options"):
            parts |= _options(visitors)
        with gr.Accordion("Complete a picture", open=False, elem_id="d1-complete") as completion:
            parts |= _completion(visitors)
        parts["completion"] = completion
        parts["status"] = gr.HTML(status(""), elem_id="d1-status", apply_default_css=False)
        parts["pictures"] = gr.HTML(
            "", elem_id="d1-pictures", apply_default_css=False, js_on_load=_script("gallery.js")
        )
        _connect_drawing(blocks, visitors, parts)
        _connect_filling(visitors, parts)
    blocks.state_session_capacity = SESSIONS
    return blocks


def _main_fields(visitors: Visitors) -> Components:
    limits, names = visitors.worker.limits, list(visitors.shapes)
    parts: Components = {}
    with gr.Row(elem_id="d1-main"):
        parts["captions"] = gr.Textbox(
            label="captions",
            show_label=False,
            placeholder="Say what to draw. Each line is a caption of its own.",
            lines=2,
            max_lines=limits.captions,
            container=False,
            elem_id="d1-captions",
            autofocus=True,
        )
        with gr.Column(scale=0, elem_id="d1-go"):
            parts["model"] = gr.Dropdown(
                names, value=names[0], show_label=False, container=False, visible=len(names) > 1
            )
            parts["draw"] = gr.Button("Draw", variant="primary", elem_id="d1-draw")
            parts["stop"] = gr.Button("Stop", visible=False, elem_id="d1-stop")
    return parts


def _options(visitors: Visitors) -> Components:
    default, most = Form(), visitors.worker.limits.candidates
    shape = next(iter(visitors.shapes.values()))
    every = [shape.sampling for shape in visitors.shapes.values()]
    parts: Components = {}
    with gr.Row():
        parts["candidates"] = gr.Slider(
            1,
            most,
            min(default.candidates, most),
            step=1,
            label="Candidates",
            info="drawn for each caption; the best of more are better",
            visible=shape.ranked,
        )
        parts["keep"] = gr.Slider(
            1,
            visitors.page.keep,
            min(default.keep, visitors.page.keep),
            step=1,
            label="Pictures",
            info="shown of each caption",
        )
    with gr.Row():
        parts["temperature"] = gr.Slider(
            0,
            max(2, *(own.temperature for own in every)),
            shape.sampling.temperature,
            step=0.05,
            label="Temperature",
            info="lower is calmer",
        )
        parts["guidance"] = gr.Slider(
            0,
            max(8, *(own.guidance for own in every)),
            shape.sampling.guidance,
            step=0.25,
            label="Guidance",
            info="1: none",
        )
        parts["top_k"] = gr.Number(0, label="Top k", info="likeliest tokens; 0: all", precision=0)
        parts["top_p"] = gr.Slider(
            0.05, 1, default.top_p, step=0.05, label="Top p", info="likeliest tokens by mass"
        )
    with gr.Row():
        parts["seed"] = gr.Number(
            default.seed, label="Seed", info="the same one draws the same pictures", precision=0
        )
        parts["new_seed"] = gr.Checkbox(
            True, label="Another seed for each drawing", info="so that the pictures are new ones"
        )
    return parts


def _completion(visitors: Visitors) -> Components:
    shape = next(iter(visitors.shapes.values()))
    parts: Components = {}
    parts["picture"] = gr.HTML(
        "",
        html_template=PICTURE,
        apply_default_css=False,
        js_on_load=_script("picture.js"),
        most=visitors.page.upload_bytes,
        ratio=f"{shape.read_size[0]} / {shape.read_size[1]}",
    )
    parts["rows"] = gr.Slider(
        0,
        shape.grid[0] - 1,
        0,
        step=1,
        label="Rows to keep",
        info="from the top; the rest is drawn. 0: the picture is not used",
    )
    return parts


def _connect_drawing(blocks: gr.Blocks, visitors: Visitors, parts: Components) -> None:
    fields = [parts[name] for name in FIELDS]
    changed = [parts[name] for name in ("pictures", "status", "draw", "stop", "seed")]

    async def draw(request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:
        async for view in visitors.draw(_visitor(request), Form(*values)):
            yield _changes(view)

    def stop(request: gr.Request) -> None:
        visitors.stop(_visitor(request))

    def leave(request: gr.Request) -> None:
        visitors.leave(_visitor(request))

    gr.on([parts["draw"].click, parts["captions"].submit], draw, fields, changed, **_quietly())
    parts["stop"].click(stop, **_quietly())
    blocks.unload(leave)


def _changes(view: View) -> list[Any]:
    """New values of pictures, status, the buttons and the seed."""
    return [
        gr.skip() if view.pictures is None else view.pictures,
        view.status,
        gr.update(visible=not view.drawing),
        gr.update(visible=view.drawing),
        gr.skip() if view.seed is None else view.seed,
    ]


def _connect_filling(visitors: Visitors, parts: Components) -> None:
    fields = [name for name in FIELDS if name not in ("model", "picture")]
    changed = [parts[name] for name in ("picture", "status", "completion", *fields)]
    rows = {name: shape.grid[0] for name, shape in visitors.shapes.items()}

    def changes(filling: Filling) -> list[Any]:
        values = [filling.values.get(name, gr.skip()) for name in fields]
        return [filling.picture, status(filling.told), gr.update(open=True), *values]

    def refused(error: ValueError) -> list[Any]:
        return ["", mistake(error), gr.skip(), *(gr.skip() for _ in fields)]

    def upload(picture: Any, model: Any) -> list[Any]:
        try:
            shape = visitors.shape(model)
            return changes(fill_from_upload(picture, shape, visitors.page))
        except ValueError as error:
            return refused(error)

    def use(model: Any, event: gr.EventData) -> list[Any]:
        try:
            shape, sent = visitors.shape(model), event._data
            picture = sent.get("picture") if isinstance(sent, dict) else None
            return changes(continue_from(picture, shape, visitors.page))
        except ValueError as error:
            return refused(error)

    own = [shape.sampling for shape in visitors.shapes.values()]

    def choose(model: Any, temperature: Any, guidance: Any) -> list[Any]:
        try:
            shape = visitors.shape(model)
        except ValueError as error:
            return [gr.skip()] * 4 + [mistake(error)]
        rows = gr.update(maximum=shape.grid[0] - 1, value=0)
        candidates = gr.update(visible=shape.ranked)
        # What a visitor has chosen, or a picture has filled in, is no model's own and stays. In
        # lists: what a program sends in their place may have no hash.
        begun = [
            shape.sampling.temperature
            if temperature in [s.temperature for s in own]
            else gr.skip(),
            shape.sampling.guidance if guidance in [s.guidance for s in own] else gr.skip(),
        ]
        return [rows, candidates, *begun, status("")]

    parts["picture"].upload(upload, [parts["picture"], parts["model"]], changed, **_quietly())
    parts["pictures"].select(use, parts["model"], changed, **_quietly())
    chosen = [parts[name] for name in ("rows", "candidates", "temperature", "guidance", "status")]
    asked = [parts[name] for name in ("model", "temperature", "guidance")]
    parts["model"].change(choose, asked, chosen, **_quietly())
    dim = (
        "(rows, model) => document.documentElement.style.setProperty('--d1-kept', "
        f"rows / {json.dumps(rows)}[model])"
    )
    parts["rows"].change(None, [parts["rows"], parts["model"]], js=dim, **_quietly())


def _visitor(request: gr.Request) -> str:
    return request.session_hash or ""


def _quietly() -> dict[str, Any]:
    """How events are wired: values as they come, which the form checks; any number at once, which
    wait in the worker's queue; and no place in a programming interface."""
    return {
        "preprocess": False,
        "concurrency_limit": None,
        "show_progress": "hidden",
        "api_visibility": "private",
    }


def _theme() -> gr.themes.Base:
    """Grays, so that the colors are the pictures'; fonts of the visitor's system, since those of
    Gradio's own themes come from elsewhere."""
    return gr.themes.Base(
        primary_hue="stone",
        secondary_hue="stone",
        neutral_hue="stone",
        font=SYSTEM_FONTS,
        font_mono=MONOSPACE,
    ).set(
        body_background_fill="#faf9f7",
        body_background_fill_dark="#171412",
        body_text_color_subdued="#6f6862",
        body_text_color_subdued_dark="#a8a29e",
        color_accent="#4d7c5f",
        slider_color="#4d7c5f",
        slider_color_dark="#86b59a",
        button_primary_background_fill="#2b2724",
        button_primary_background_fill_hover="#000000",
        button_primary_text_color="#ffffff",
        button_primary_background_fill_dark="#e7e5e4",
        button_primary_background_fill_hover_dark="#ffffff",
        button_primary_text_color_dark="#171412",
    )


def _script(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
