"""The HTML of the parity page, for jinja2."""

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Parity: {{ verdict }}</title>
<style>
:root {
  --back: #ffffff; --panel: #f4f5f7; --ink: #1a1d21; --quiet: #5a626c; --rule: #b9c0c8;
  --pass: #15713a; --fail: #b3261e; --open: #8a5300;
  --series-1: #1f6fc4; --series-2: #c2570c; --series-3: #6d43b8; --series-4: #3f6b1f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #15181c; --panel: #1f242a; --ink: #e8eaed; --quiet: #a3acb6; --rule: #4d5761;
    --pass: #63d08b; --fail: #ff8a80; --open: #f2b457;
    --series-1: #6bb1ff; --series-2: #ffa45c; --series-3: #c0a2ff; --series-4: #a5d67c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h2 { margin: 2.5rem 0 .5rem; font-size: 1.3rem; }
h3 { margin: 0 0 .25rem; font-size: 1rem; }
p, ul { margin: .5rem 0; max-width: 70ch; }
.verdict { border-left: .5rem solid var(--mark); background: var(--panel); padding: 1rem 1.25rem; }
.verdict h1 { margin: 0; font-size: clamp(1.8rem, 7vw, 3rem); line-height: 1.15; color: var(--mark); }
.verdict ul { padding-left: 1.25rem; }
.pass { --mark: var(--pass); } .fail { --mark: var(--fail); } .open { --mark: var(--open); }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); }
.plots { gap: 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.highlight { background: var(--panel); padding: .75rem 1rem; }
.highlight strong { display: block; font-size: 1.5rem; line-height: 1.3; }
.quiet, small, figcaption { color: var(--quiet); font-size: .85rem; }
dl { display: grid; grid-template-columns: minmax(8rem, 15rem) 1fr; gap: .3rem 1rem; margin: .5rem 0; }
dt { color: var(--quiet); } dd { margin: 0; }
table { width: 100%; border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .25rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .5rem .35rem 0; border-top: 1px solid var(--rule); }
thead th { border-top: 0; color: var(--quiet); font-weight: 400; font-size: .85rem; }
tbody th { font-weight: 400; }
td small { display: block; }
.figures { table-layout: fixed; } .figures thead th:first-child { width: 34%; }
.bad, .bad small { color: var(--fail); font-weight: 700; }
figure { margin: 0; } svg { display: block; width: 100%; height: auto; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  table { font-size: .85rem; }
}
</style>
</head>
<body>
<main>
<header class="verdict {{ style }}">
<p class="quiet">Parity of the steered engine with the steered eager model</p>
<h1>{{ verdict[0] | upper }}{{ verdict[1:] }}</h1>
<p>{{ headline }}</p>
{% if failures %}
<ul>
{% for failure in failures %}
<li>{{ failure }}</li>
{% endfor %}
</ul>
{% endif %}
</header>
{% if highlights %}
<section class="grid" aria-label="Summary" style="margin-top: 1rem">
{% for item in highlights %}
<div class="highlight">{{ item.name }} <strong>{{ item.value }}</strong> <small>{{ item.note }}</small></div>
{% endfor %}
</section>
{% endif %}

<section>
<h2>What was {{ "compared" if cases else "built" }}</h2>
<dl>
{% for label, value in facts %}
<dt>{{ label }}</dt><dd>{{ value }}</dd>
{% endfor %}
<dt>Where the limits come from</dt><dd>{{ limits_source }}</dd>
</dl>
</section>

{% if plots %}
<section>
<h2>Plots</h2>
<div class="grid plots">
{% for plot in plots %}
<figure>
<h3>{{ plot.title }}</h3>
{% if plot.svg %}
{{ plot.svg | safe }}
{% endif %}
<figcaption>{{ plot.caption }}</figcaption>
</figure>
{% endfor %}
</div>
</section>
{% endif %}

<section>
<h2>Figures</h2>
{% if groups %}
<p class="quiet">Under each figure: its margin, as the number of times its deviation could grow before the limit
breaks. “Exact” means that the limit allows no deviation and there is none.</p>
{% else %}
<p>Nothing was measured.</p>
{% endif %}
{% for group in groups %}
<table class="figures">
<caption>{{ group.name }}</caption>
<thead>
<tr><th scope="col">Figure</th><th scope="col">Limit</th>
{% for column in group.columns %}
<th scope="col">{{ column }}</th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for row in group.rows %}
<tr><th scope="row">{{ row.what }}</th><td>{{ row.limit }}</td>
{% for cell in row.cells %}
{% if cell %}
<td{% if not cell.passed %} class="bad"{% endif %}><data value="{{ cell.exact }}">{{ cell.text }}</data>
<small>{% if not cell.passed %}FAILED, margin {% endif %}{{ cell.headroom }}</small>
{% if cell.detail %}
<small>{{ cell.detail }}</small>
{% endif %}
</td>
{% else %}
<td class="quiet">not measured</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
{% endfor %}
</section>

{% if cases %}
<section>
<h2>Negative controls</h2>
<p class="quiet">Engines that are wrong on purpose. A comparison that lets one of them pass proves nothing.</p>
{% for case in cases %}
{% if case.controls %}
<table>
<caption>{{ case.case }}</caption>
<thead><tr><th scope="col">Engine</th><th scope="col">Caught by</th></tr></thead>
<tbody>
{% for control in case.controls %}
<tr><th scope="row">{{ control.name }}</th>
{% if control.caught %}
<td>{{ control.caught_by | length }}: {{ control.caught_by | join(" · ") }}</td>
{% else %}
<td class="bad">NOT CAUGHT</td>
{% endif %}
</tr>
{% endfor %}
</tbody>
</table>
{% else %}
<p>{{ case.case }}: no control was run. There is no effect to lose at strength 0, and nothing to compare when
outputs are not comparable.</p>
{% endif %}
{% endfor %}
</section>
{% endif %}
</main>
</body>
</html>
"""
