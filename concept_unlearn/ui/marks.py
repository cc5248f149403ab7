"""Tokens, and what comes next, as HTML. Everything that a model or a user wrote is escaped here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape

from ..patches.explain import Explanation, Guess, Moment
from ..patches.watch import Fired
from .answer import Reply
from .muted import Named

_SHOWN = 5
"""Guesses and features told of a token."""


def reply_html(side: str, reply: Reply, strongest: float) -> str:
    body = "".join(_token(f"{side}-{i}", said.text, said.fired, strongest) for i, said in enumerate(reply.said))
    caret = '<span class="caret" aria-hidden="true"></span>' if reply.state == "writing" else ""
    empty = '<span class="quiet">It said nothing: the end token came first.</span>'
    return body + caret if body or reply.state != "done" else empty


def prompt_html(explanation: Explanation, head: int, special: Collection[str], strongest: float) -> str:
    """The prompt, with one chip for its first ``head`` tokens, which every chat begins with."""
    moments = explanation.moments
    lit = sum(bool(moment.fired) for moment in moments[:head])
    chip = f'<span class="chip quiet" title="{lit} of its {head} tokens have a feature that fires">chat opening</span>'
    body = "".join(
        _token(f"prompt-{i}", moment.text, moment.fired, strongest, _css(moment, special))
        for i, moment in enumerate(moments[head:], head)
    )
    return (chip + " " if head else "") + body


def shift_html(moment: Moment) -> str:
    """What the model expected next, and what it expects with the patch: a row a token, the likeliest of either side."""
    sides = [{g.text: g.probability for g in guesses} for guesses in (moment.before, moment.after)]
    likely = [[g.text for g in guesses[:_SHOWN]] for guesses in (moment.before, moment.after)]
    least = [min(side.values(), default=0.0) for side in sides]
    texts = sorted(dict.fromkeys(likely[0] + likely[1]), key=lambda t: -max(side.get(t, 0.0) for side in sides))
    rows = "".join(
        f'<tr><th scope="row"><span class="word">{shown(text)}</span></th>'
        + "".join(_bar(side.get(text), least[i], ("original", "patched")[i]) for i, side in enumerate(sides))
        + "</tr>"
        for text in texts
    )
    heads = '<th scope="col">next token</th><th scope="col">original</th><th scope="col">patched</th>'
    return f'<table class="shift"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def moment_html(moment: Moment, words: Mapping[Named, Sequence[str]]) -> str:
    """A token of the prompt."""
    facts = []
    if moment.is_open is not None:
        facts.append(f"gate {'open' if moment.is_open else 'closed'}")
    facts.append(f"moved by {moment.moved:.1%}" if moment.moved else "not moved")
    facts.append(f"KL of what comes next {moment.kl:.3f} nats")
    return _about(moment.text, facts, moment.fired, words) + shift_html(moment)


def said_html(text: str, guesses: Sequence[Guess], fired: Sequence[Fired], words: Mapping[Named, Sequence[str]]) -> str:
    """A token of a reply."""
    rows = "".join(
        f'<tr><th scope="row"><span class="word">{shown(g.text)}</span></th>{_bar(g.probability, 0.0, "own")}</tr>'
        for g in guesses[:_SHOWN]
    )
    table = (
        f'<table class="shift"><thead><tr><th scope="col">it could have said</th><th></th></tr></thead>{rows}</table>'
    )
    return _about(text, [], fired, words) + table


def named(site: str, feature: int, words: Mapping[Named, Sequence[str]]) -> str:
    """A feature as a person reads it."""
    raised = " ".join(word.strip() for word in words.get((site, feature), ()) if word.strip())
    return f"{feature} · {raised}" if raised else str(feature)


def shown(text: str) -> str:
    """White space made visible."""
    return escape(text.strip(" ").replace("\n", "⏎").replace("\t", "⇥")) or "␣"


def strongest(*fired: Sequence[Fired]) -> float:
    """The activation that is marked most."""
    return max((abs(f.act) for own in fired for f in own), default=0.0)


def _css(moment: Moment, special: Collection[str]) -> str:
    found = " closed" if moment.is_open is False else ""
    return found + (" special" if moment.text.strip() in special else "")


def _token(name: str, text: str, fired: Sequence[Fired], most: float, css: str = "") -> str:
    if not fired:
        return f'<span class="{css}" data-token="{name}">{escape(text)}</span>'
    share, word = abs(fired[0].act) / most if most else 0.0, text.lstrip(" ") or text
    space = " " * (len(text) - len(word))
    title = ", ".join(f"{f.feature}: {f.act:.3g}" for f in fired[:_SHOWN])
    title += f" and {len(fired) - _SHOWN} more" if len(fired) > _SHOWN else ""
    return (
        f'{space}<span class="lit{css}" style="--a:{share:.2f}" data-token="{name}" tabindex="0" role="button" '
        f'title="{escape(title)}">{escape(word)}</span>'
    )


def _about(text: str, facts: Sequence[str], fired: Sequence[Fired], words: Mapping[Named, Sequence[str]]) -> str:
    told = f' <span class="quiet">{escape(", ".join(facts))}</span>' if facts else ""
    several = len({site for site, _ in words}) > 1
    lines = "".join(
        f"<li><b>{f.act:.3g}</b> {escape(named(f.site, f.feature, words))} "
        f'<span class="quiet">{escape(f.site) if several else ""}</span></li>'
        for f in fired[:_SHOWN]
    )
    more = f'<li class="quiet">and {len(fired) - _SHOWN} more</li>' if len(fired) > _SHOWN else ""
    none = '<p class="quiet">None of the patch&#8217;s features fires here.</p>'
    return f'<p><span class="word">{shown(text)}</span>{told}</p>' + (f"<ul>{lines}{more}</ul>" if fired else none)


def _bar(share: float | None, least: float, css: str) -> str:
    told = f"{share:.1%}" if share is not None else f"&lt; {least:.1%}"
    width = 100 * (share or 0.0)
    return f'<td><span class="bar {css}"><i style="width:{width:.1f}%"></i></span><span class="n">{told}</span></td>'
