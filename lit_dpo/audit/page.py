"""An audit as one HTML page that needs no other file and runs no script."""

from html import escape

from lit_dpo.audit.cost import Cost
from lit_dpo.audit.facts import Distribution, SourceFacts, TemplateFacts
from lit_dpo.audit.text import cost_rows, distributions, number
from lit_dpo.audit.verdicts import Verdict

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --ground: #ffffff; --panel: #f6f8fa;
  --blue: #0072b2; --orange: #b35900; --red: #b3261e; --green: #00695c; --purple: #7b3fa0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --line: #373e47; --ground: #14181d;
  --panel: #1d232a; --blue: #6cb6ff; --orange: #ffb454; --red: #ff8a80; --green: #5eead4; --purple: #d2a8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .8rem; overflow-wrap: anywhere; }
p, .soft { color: var(--soft); } table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
thead th { color: var(--soft); }
.verdict { border-left: .35rem solid var(--c); background: var(--panel); padding: .6rem .9rem; margin: .5rem 0;
  border-radius: .3rem; overflow-wrap: anywhere; } .verdict b { color: var(--c); text-transform: uppercase;
  font-size: .78rem; letter-spacing: .05em; margin-right: .6rem; } .error { --c: var(--red); }
.warning { --c: var(--orange); } .note { --c: var(--blue); } .good { --c: var(--green); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); gap: 1rem; }
.plots, .big { margin: 1rem 0; }
figure { margin: 0; padding: .8rem; background: var(--panel); border-radius: .4rem; } svg { width: 100%; height: auto; }
figcaption { font-size: .9rem; color: var(--soft); } svg rect { fill: var(--blue); } svg text { fill: var(--soft);
  font-size: 11px; } svg line { stroke: var(--line); }
.big { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; }
.big div { background: var(--panel); border-radius: .4rem; padding: .7rem .9rem; } .big b { display: block;
  font-size: 1.35rem; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: .9rem; border-radius: .4rem;
  font: 13px/1.6 ui-monospace, Menlo, Consolas, monospace; } .prompt { color: var(--soft); }
.chosen { color: var(--green); } .rejected { color: var(--red); } .special { color: var(--purple); font-weight: 600; }
.special:not(.trained), .prompt { opacity: .75; } code { overflow-wrap: anywhere; font-size: .85em; }
@media print { .verdict, figure, .big div, pre { background: none; border: 1px solid var(--line); } }
"""
WIDTH, HEIGHT, FOOT = 320, 110, 18


def as_page(
    verdicts: list[Verdict], sources: list[SourceFacts], template: TemplateFacts | None, cost: Cost | None
) -> str:
    """The audit as HTML.

    Args:
        verdicts: The verdicts, worst first.
        sources: The facts of each source.
        template: What the chat template wrote.
        cost: What training would take.
    """
    parts = [_verdict(one) for one in verdicts]
    if not verdicts:
        parts = ['<div class="verdict good"><b>fine</b>Nothing to object to.</div>']
    parts += [_source(source) for source in sources]
    parts += [] if template is None else [_example(template)]
    if cost is not None:
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in cost_rows(cost))
        parts.append(f"<h2>Estimates for an epoch</h2><table><tbody>{rows}</tbody></table>")
    kept, read = (sum(getattr(source, name) for source in sources) for name in ("kept", "rows"))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Audit of preference data</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{STYLE}</style></head><body><main><h1>Audit of preference data</h1>"
        f"<p>{kept:,} of {read:,} rows are kept.</p>{''.join(parts)}</main></body></html>\n"
    )


def _verdict(one: Verdict) -> str:
    return f'<div class="verdict {one.severity}"><b>{one.severity}</b>{escape(one.message)}</div>'


def _source(source: SourceFacts) -> str:
    use = "training and held-out" if source.use == "both" else source.use
    numbers = [
        ("rows", f"{source.rows:,}"),
        ("pairs kept", f"{source.kept:,}"),
        ("longer wins", f"{source.longer_wins:.1%}"),
    ]
    if source.scored:
        numbers += [("ties", f"{source.ties:,}"), ("against the score", f"{source.against:,}")]
    numbers += [(name.replace("_", " "), f"{count:,}") for name, count in source.found.items()]
    numbers += [("cut prompts", f"{source.cut_prompts:,}"), ("cut responses", f"{source.cut_responses:,}")]
    numbers += [("different prompts", f"{source.prompts:,}"), ("tokens", f"{source.tokens:,}")]
    big = "".join(f"<div><b>{value}</b>{escape(name)}</div>" for name, value in numbers)
    formats = ", ".join(f"{name} ({count:,})" for name, count in source.formats.items()) or "nothing"
    rows = "".join(
        f'<tr><td class="n">{left.count:,}</td><td>{escape(reason)}</td><td class="n">row {left.row:,}</td>'
        f"<td><code>{escape(left.example)}</code></td></tr>"
        for reason, left in source.left_out.items()
    )
    table = (
        '<h3>Left out</h3><div class="wide"><table><thead><tr><th class="n">rows</th><th>reason</th>'
        f'<th class="n">first</th><th>its beginning</th></tr></thead><tbody>{rows}</tbody></table></div>'
        if rows
        else ""
    )
    notes = "".join(
        f'<tr><td class="n">{count:,}</td><td>{escape(note)}</td></tr>' for note, count in source.notes.items()
    )
    noted = f"<h3>Noted</h3><table><tbody>{notes}</tbody></table>" if notes else ""
    plots = "".join(_histogram(name, one) for name, one in distributions(source))
    return (
        f"<h2>{escape(source.source)} <span class='soft'>· {use}</span></h2><p>Read as: {escape(formats)}</p>"
        f'<div class="big">{big}</div><div class="plots">{plots}</div>{table}{noted}'
    )


def _histogram(name: str, distribution: Distribution) -> str:
    most = max(distribution.counts) or 1
    width = WIDTH / len(distribution.counts)
    bars = "".join(
        f'<rect x="{place * width:.1f}" y="{HEIGHT * (1 - count / most):.1f}" width="{width - 1:.1f}" '
        f'height="{HEIGHT * count / most:.1f}"><title>{number(low)} to {number(high)}: {count:,}</title></rect>'
        for place, (count, low, high) in enumerate(
            zip(distribution.counts, distribution.edges, distribution.edges[1:], strict=False)
        )
    )
    low, high = distribution.edges[0], distribution.edges[-1]
    beyond = "+" if distribution.most > high else ""
    said = (
        f"{name}: least {number(distribution.least)}, median {number(distribution.median)}, 95 % below "
        f"{number(distribution.p95)}, most {number(distribution.most)}"
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT + FOOT}" role="img" aria-label="{escape(said)}">{bars}'
        f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/><text x="0" y="{HEIGHT + 14}">{number(low)}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end">{number(high)}{beyond}</text></svg>'
        f"<figcaption>{escape(said)}</figcaption></figure>"
    )


def _example(template: TemplateFacts) -> str:
    shown = []
    for part in template.example:
        spans = "".join(
            f'<span class="{"special" if special else part.kind}{" trained" * trained}">{escape(text)}</span>'
            for text, trained, special in part.tokens
        )
        shown.append(f"<h3>{part.kind}</h3><pre>{spans}</pre>")
    return (
        "<h2>A pair as the policy reads it</h2>"
        f"<p>Special tokens are bold. Paler tokens are read, but not trained on.</p>{''.join(shown)}"
    )
