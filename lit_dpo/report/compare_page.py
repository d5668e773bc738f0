"""An ``Arena`` ──► a local page: two answers side by side, votes, the running win rate.

Texts are shown in text boxes, which never read them as HTML. The page asks for no fonts from the network.
"""

import os
from collections.abc import Iterator
from typing import Any

from lit_dpo.report.arena import Arena, Choice, Round

FONT = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
CSS = """
.gradio-container { width: 100% !important; max-width: 80rem !important; margin: 0 auto !important; }
footer { display: none !important; }
"""


def build_page(arena: Arena, prompts: list[str], max_new_tokens: int, temperature: float, system: str | None) -> Any:
    """The page, not launched.

    Args:
        arena: The models and the votes.
        prompts: Prompts that a button takes, one after the other.
        max_new_tokens: Maximum number of tokens of an answer, at first.
        temperature: Temperature of sampling, at first.
        system: System message, at first.

    Raises:
        ModuleNotFoundError: If gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("compare needs gradio: pip install 'lit_dpo[compare]'") from error

    first, second = (side.name for side in arena.sides)
    names = ("Left", "Right") if arena.blind else (first, second)

    def ask(prompt: str, system: str, tokens: float, heat: float) -> Iterator[tuple[Any, ...]]:
        off = [gr.update(interactive=False)] * 3
        try:
            current: Round | None = None
            for current in arena.ask(prompt, system or None, int(tokens), float(heat)):
                yield *boxes(current.texts), current, "", *off
            if current is not None:
                yield *boxes(current.texts), current, "Which answer is better?", *[gr.update(interactive=True)] * 3
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def boxes(texts: list[str], labels: tuple[str, ...] = names) -> list[Any]:
        return [gr.update(value=text, label=label) for text, label in zip(texts, labels, strict=True)]

    def vote(choice: Choice) -> Any:
        def voted(current: Round | None) -> tuple[Any, ...]:
            try:
                if current is None:
                    raise ValueError("Ask something first.")
                told = arena.vote(current, choice)
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from error
            shown = tuple(arena.sides[place].name for place in current.order)
            off = [gr.update(interactive=False)] * 3
            return *boxes(current.texts, shown), current, told, arena.standing(), *off

        return voted

    def following(number: int) -> tuple[str, int]:
        return prompts[number % len(prompts)], number + 1

    with gr.Blocks(title="Compare", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# Compare two models")
        standing = gr.Textbox(arena.standing, label="Standing", interactive=False)
        current, number = gr.State(None), gr.State(0)
        prompt = gr.Textbox(label="Prompt", lines=3, autofocus=True, elem_id="prompt")
        with gr.Row():
            send = gr.Button("Ask both", variant="primary", elem_id="ask")
            if prompts:
                another = gr.Button(f"Next of {len(prompts)} prompts")
                another.click(following, number, [prompt, number])
        with gr.Accordion("Sampling", open=False):
            tokens = gr.Number(max_new_tokens, precision=0, minimum=1, label="Most new tokens")
            heat = gr.Slider(0, 2, temperature, step=0.05, label="Temperature (0: the likeliest token)")
            message = gr.Textbox(system or "", label="System message")
        with gr.Row(equal_height=True):
            texts = [
                gr.Textbox(label=name, lines=12, max_lines=30, interactive=False, elem_id=place)
                for name, place in zip(names, ("left", "right"), strict=True)
            ]
        with gr.Row():
            labels = (("left", f"{names[0]} is better"), ("tie", "Tie"), ("right", f"{names[1]} is better"))
            buttons = [gr.Button(label, interactive=False, elem_id=f"vote-{choice}") for choice, label in labels]
        told = gr.Textbox(label="Vote", interactive=False, elem_id="told")
        inputs, outputs = [prompt, message, tokens, heat], [*texts, current, told, *buttons]
        send.click(ask, inputs, outputs)
        prompt.submit(ask, inputs, outputs)
        for (choice, _), button in zip(labels, buttons, strict=True):
            button.click(vote(choice), current, [*texts, current, told, standing, *buttons])  # type: ignore[arg-type]
    return page


def launch(page: Any, host: str, port: int | None, *, block: bool = True) -> str:
    """Serves the page. Returns its address.

    Args:
        page: What ``build_page`` gives.
        host: Address to listen on; 127.0.0.1 is reached from this machine alone.
        port: Port; None for the next free one from 7860 on.
        block: Whether to serve until Ctrl-C.
    """
    import gradio as gr

    theme = gr.themes.Default(primary_hue="blue", font=FONT, font_mono=["ui-monospace", "monospace"])
    theme.set(button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800")
    theme.set(button_primary_background_fill_dark="*primary_700", block_label_text_color="*neutral_700")
    _, address, _ = page.queue(default_concurrency_limit=1).launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        theme=theme,
        css=CSS,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    if block:
        page.block_thread()
    return str(address)
