"""The raters' page: a Gradio frame around ``page.js``, which draws what the server's routes say.

Gradio's own video element is not used: it shows the file's name and a hash that is the same for every rater.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import; no request leaves the machine

import gradio as gr
from fastapi import FastAPI


def mount_page(app: FastAPI, texts: dict[str, Any]) -> FastAPI:
    """Mount the page at ``/``, after the app's own routes.

    Args:
        app: with the routes that the page calls.
        texts: of the page, from :func:`studies.texts.load_texts`.
    """
    here = Path(__file__).parent
    title = escape(str(texts["title"]))
    noscript = "<noscript>This page needs JavaScript.</noscript>"
    with gr.Blocks(title=str(texts["title"]), analytics_enabled=False) as blocks:
        gr.HTML(f'<div id="study" lang="{escape(str(texts["lang"]))}"><p>{title}</p>{noscript}</div>')
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        css=(here / "page.css").read_text("utf-8"),
        head=f"<script>{(here / 'page.js').read_text('utf-8')}</script>",
        theme=gr.themes.Base(font=["system-ui"], font_mono=["monospace"]),
        show_error=False,
        run_history=False,
        footer_links=[],
        allowed_paths=[],
        max_file_size=1,
        ssr_mode=False,
    )
