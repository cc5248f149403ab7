"""The page: a message, the two replies side by side, what comes next, and the knobs."""

from __future__ import annotations

from concurrent.futures import Future
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from nicegui import ui

from ..patches import Explanation
from .answer import Question, Reply, explain
from .knobs import Knobs
from .marks import moment_html, prompt_html, reply_html, said_html, shift_html, strongest
from .panel import Panel
from .shelf import Shelf
from .stage import Stage

_HERE = Path(__file__).parent
_TICK = 0.1
"""Seconds between two looks at what the model has written."""
_TURNED = "made before the knobs were turned"
_STATES = {
    "waiting": "waiting", "writing": "writing …", "done": "", "stopped": "stopped", "failed": "failed",
}  # fmt: skip


class _Again(NamedTuple):
    """The last prompt as it is being read anew."""

    explanation: Future[Explanation]
    under: tuple[str, Knobs]


class Chat:
    """What one open page shows. Its thread is that of the server; the model runs in the stage's."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.name = next(iter(stage.patches))
        self._special = frozenset(stage.lm.tokenizer.all_special_tokens)
        self.question: Question | None = None
        self.explanation: Explanation | None = None
        self._under = (self.name, Knobs(strength=stage.patches[self.name].strength))
        """The patch that the explanation is of, and its knobs."""
        self._again: _Again | None = None
        self._is_stale, self._is_turned, self._shown = False, False, ""
        self._histories: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self._build()
        ui.timer(_TICK, self._tick)
        ui.on("token", lambda event: self._tell(str(event.args)))
        client = ui.context.client
        client.on_disconnect(self.stop)
        client.on_delete(self.stop)

    # What is on the page.

    def _build(self) -> None:
        with ui.element("main").classes("chat"):
            with ui.element("aside"):
                if len(self.stage.patches) > 1:
                    ui.select(list(self.stage.patches), value=self.name, label="Patch", on_change=self._choose).props(
                        "outlined dense options-dense"
                    ).classes("card-select")
                self._aside: Any = ui.element("div")
                self._fill_panel()
            with ui.element("div").classes("talk"):
                self._build_talk()

    def _build_talk(self) -> None:
        with ui.element("section").classes("card ask"):
            self._message = ui.textarea(label="Message", placeholder="Ask both").props("autogrow outlined dense rows=2")
            self._message.on("keydown.enter.exact.prevent", self.ask)
            with ui.element("div").classes("line"):
                with ui.element("div").classes("line tight"):
                    self._ask = ui.button("Ask", on_click=self.ask).props("unelevated no-caps")
                    self._stop = ui.button("Stop", on_click=self.stop).props("outline no-caps")
                    self._stop.disable()
                with ui.element("div").classes("line tight options"):
                    self._goes_on = ui.checkbox("Go on with the talk").props("dense")
                    self._temperature = ui.number("Temperature", value=0.0, min=0, max=2, step=0.1)
                    self._length = ui.number("Longest reply", value=96, min=1, max=2048, step=16)
                    for number in (self._temperature, self._length):
                        number.props("outlined dense").classes("number")
        self._problem = ui.label().classes("problem").props('role="alert"')
        self._problem.set_visibility(False)
        with ui.element("div").classes("sides"):
            self._sides = {
                "original": _Side("Original", self.stage.lm.name), "patched": _Side("Patched", self.name),
            }  # fmt: skip
        with ui.element("section").classes("card why"):
            ui.html("The prompt, token by token", tag="h2", sanitize=False)
            self._legend = ui.label(
                "Marked: a feature of the patch fires; underlined: a closed gate leaves it be. Click a token for more."
            )
            self._legend.classes("quiet small")
            self._prompt = ui.html("", sanitize=False).classes("text prompt")
            with ui.element("div").classes("two"):
                with ui.element("div"):
                    ui.html("Next token after the prompt", tag="h3", sanitize=False)
                    self._shift = ui.html('<p class="quiet">Nothing asked yet.</p>', sanitize=False).classes("next")
                with ui.element("div"):
                    ui.html("Chosen token", tag="h3", sanitize=False)
                    self._chosen = ui.html('<p class="quiet">None.</p>', sanitize=False).classes("chosen-token")

    def _fill_panel(self) -> None:
        self._aside.clear()
        with self._aside:
            self._panel = Panel(self.stage.patches[self.name], self.stage.words[self.name], self._turned)

    # What is done on it.

    def ask(self) -> None:
        message = str(self._message.value or "").strip()
        if not message or self._busy:
            return
        if not self._goes_on.value:
            self._histories = ((), ())
        self._under, self._again = (self.name, self._panel.knobs()), None
        self.question = Question(
            message, self._under[1].turned(self.stage.patches[self.name]),
            max_new_tokens=int(self._length.value or 96), temperature=float(self._temperature.value or 0.0),
            original=Reply(self._histories[0]), patched=Reply(self._histories[1]),
        )  # fmt: skip
        self.explanation, self._is_stale, self._is_turned = None, False, False
        self._sides["patched"].about.set_text(self._about_patched())
        self.stage.ask(self.question)
        self._ask.disable()
        self._stop.enable()

    def stop(self) -> None:
        if self.question is not None:
            self.question.stop()

    def _choose(self, event: Any) -> None:
        self.name = event.value
        self._fill_panel()
        self._turned()

    def _turned(self) -> None:
        self._is_stale = True

    def _tell(self, token: str) -> None:
        """What is known of a token that was clicked, ``side-number``."""
        side, _, number = token.partition("-")
        words, question, i = self.stage.words[self.name], self.question, int(number)
        if side == "prompt" and self.explanation is not None and i < len(self.explanation.moments):
            self._chosen.set_content(moment_html(self.explanation.moments[i], words))
        elif side in self._sides and question is not None:
            said = (question.original if side == "original" else question.patched).said
            if i < len(said):
                self._chosen.set_content(said_html(said[i].text, said[i].guesses, said[i].fired, words))

    # What has come of it.

    @property
    def _busy(self) -> bool:
        return self.question is not None and not self.question.finished

    def _tick(self) -> None:
        question = self.question
        if question is None:
            return
        if self._again is not None and self._again.explanation.done():
            again, self._again = self._again, None
            if (error := again.explanation.exception()) is not None:
                self._complain(f"{type(error).__name__}: {error}")
            else:
                self.explanation, self._under = again.explanation.result(), again.under
        elif self.explanation is None:
            self.explanation = question.explanation
        if self._is_stale and not self._busy and self._again is None:
            self._explain_anew(question)
        self._draw(question)
        if question.finished and not self._ask.enabled:
            self._settle(question)

    def _explain_anew(self, question: Question) -> None:
        """The prompt under the knobs as they stand now: two passes and no new reply."""
        self._is_stale, self._is_turned, knobs = False, True, self._panel.knobs()
        patch = knobs.turned(self.stage.patches[self.name])
        self._again = _Again(self.stage.run(lambda lm: explain(question, lm, patch)), (self.name, knobs))

    def _draw(self, question: Question) -> None:
        replies = {"original": question.original, "patched": question.patched}
        fired = [said.fired for reply in replies.values() for said in reply.said]
        if self.explanation is not None:
            fired += [moment.fired for moment in self.explanation.moments]
        most = strongest(*fired)
        state = repr([(len(r.said), r.state, id(self.explanation), self._is_turned, most) for r in replies.values()])
        if state == self._shown:
            return
        self._shown = state
        for name, reply in replies.items():
            told = _TURNED if self._is_turned and name == "patched" else _STATES[reply.state]
            self._sides[name].show(reply_html(name, reply, most), told)
        if self.explanation is not None:
            self._prompt.set_content(prompt_html(self.explanation, question.head, self._special, most))
            self._shift.set_content(shift_html(self.explanation.moments[-1]))
            name, knobs = self._under
            if name == self.name:
                self._panel.read(self.explanation, knobs, question.head)

    def _settle(self, question: Question) -> None:
        """A question has come to its end."""
        self._ask.enable()
        self._stop.disable()
        self._complain(question.error)
        if question.error is None:
            self._histories = tuple(  # type: ignore[assignment]
                (*reply.history, question.message, reply.text) for reply in (question.original, question.patched)
            )

    def _complain(self, why: str | None) -> None:
        self._problem.set_text(why or "")
        self._problem.set_visibility(why is not None)

    def _about_patched(self) -> str:
        return f"{self.name} at {self._panel.knobs().strength:g}"


class _Side:
    """One column: whose it is, how far it is, what it says."""

    def __init__(self, title: str, about: str) -> None:
        with ui.element("section").classes(f"card side {title.lower()}"):
            with ui.element("div").classes("line"):
                ui.html(title, tag="h2", sanitize=False)
                self.state = ui.label().classes("quiet small state")
            self.about = ui.label(about).classes("quiet small about")
            self._text = ui.html("", sanitize=False).classes("text reply").props('aria-live="polite"')

    def show(self, content: str, state: str) -> None:
        self._text.set_content(content)
        self.state.set_text(state)


def frame(title: str, here: str) -> None:
    """What both pages begin with."""
    ui.add_css(_HERE / "page.css")
    ui.page_title(title)
    with ui.element("header"):
        ui.html(title, tag="h1", sanitize=escape)
        with ui.element("nav"):
            for name, address in (("Chat", "/"), ("Reports", "/reports")):
                ui.link(name, address).classes("here" if address == here else "")


def chat_page(stage: Stage) -> None:
    frame(f"{stage.lm.name} and its patched self", "/")
    ui.add_body_html(f"<script>{(_HERE / 'page.js').read_text()}</script>")
    Chat(stage)


def reports_page(shelf: Shelf) -> None:
    frame("Reports", "/reports")
    pages = shelf.pages()
    with ui.element("main").classes("shelf"):
        if not pages:
            ui.label(f"No report.html under {shelf.folder} yet: concept-unlearn run writes one.").classes("quiet")
            return
        with ui.element("ul"):
            for page in pages:
                with ui.element("li"):
                    ui.link(page.name, f"/runs/{quote(page.address)}")
                    ui.label(f"{page.kind}, {page.when:%Y-%m-%d %H:%M}, {page.n_bytes / 1e6:.1f} MB").classes("quiet")
