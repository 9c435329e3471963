"""The page's style sheet. Colours are variables: light first, dark on request of the reader, light on paper."""

LIGHT = {
    "bg": "#fbfaf8", "card": "#ffffff", "ink": "#1c1e22", "muted": "#5b616c", "rule": "#e4e2dd",
    "accent": "#2457c5", "middle": "#5b82d6", "early": "#7d8aa3", "band": "#d5e0f6", "bad": "#b3261e",
}  # fmt: skip
DARK = {
    "bg": "#14161a", "card": "#1c1f25", "ink": "#e7e8ea", "muted": "#a3a9b4", "rule": "#30343c",
    "accent": "#9dbdff", "middle": "#6488d2", "early": "#7f8899", "band": "#2b3a57", "bad": "#ff8a80",
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return ":root{" + "".join(f"--{name}:{value};" for name, value in colours.items()) + "}"


_RULES = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
 overflow-wrap:anywhere}
body>*{max-width:960px;margin-inline:auto;padding-inline:24px}
header{padding-top:56px}
h1{font-size:clamp(1.75rem,1.3rem + 2vw,2.5rem);line-height:1.15;letter-spacing:-.02em;margin:0;font-weight:650;
 text-wrap:balance}
.eyebrow{margin:0 0 6px;color:var(--muted);font-size:.875rem}
.subtitle{margin:10px 0 0;color:var(--muted);max-width:60ch;text-wrap:pretty}
h2{font-size:1.3125rem;line-height:1.25;letter-spacing:-.01em;margin:0 0 16px;font-weight:650}
h3{font-size:.9375rem;margin:0 0 4px;font-weight:600}
*+h3{margin-top:32px}
.intro{margin:-8px 0 16px}
section{margin-top:56px}
p{margin:0 0 12px}
.note,.quiet,figcaption{color:var(--muted);font-size:.8125rem;line-height:1.45;font-weight:400}
.note{margin:12px 0 0;max-width:70ch}
.warn{color:var(--bad)}
a{color:var(--accent);text-underline-offset:.2em}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px;border-radius:4px}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;margin:28px 0 0;padding:12px 0;
 border-block:1px solid var(--rule);font-size:.875rem}
nav a{color:var(--muted);text-decoration:none;padding-block:4px}
nav a:hover{color:var(--ink);text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:12px;margin:28px 0 0}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 16px;min-width:0}
.tile dt{color:var(--muted);font-size:.8125rem}
.tile dd{margin:2px 0 0;font-size:1.125rem;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.lead{margin-top:28px;padding:20px}
.lead+.tiles{margin-top:12px}
.lead dl{margin:0}
.lead .note{margin-top:8px}
.lead>div{display:grid;grid-template-columns:minmax(180px,1fr) 2fr;gap:12px 32px;align-items:center}
.lead .figure{font-size:2.25rem;letter-spacing:-.02em;line-height:1.1;font-weight:650}
.lead .figure small{font-size:1rem;font-weight:500;color:var(--muted);letter-spacing:0}
.gauge{display:grid;grid-template-columns:minmax(6em,max-content) minmax(40px,1fr) max-content;gap:4px 14px;
 align-items:center;font-size:.875rem;font-variant-numeric:tabular-nums;font-weight:400;
 margin:0;padding:0;list-style:none}
.gauge>li{display:contents}
.gauge .track{border-top:1px solid var(--rule);position:relative;margin-inline:5px}
.gauge .track i{position:absolute;top:-5px;width:9px;height:9px;margin-left:-4.5px;border-radius:50%;
 border:2px solid var(--muted);background:var(--card)}
.gauge .own{color:var(--ink);font-weight:600}
.gauge .own~.track i,.gauge .track .here{background:var(--accent);border-color:var(--accent)}
.gauge .ref{color:var(--muted)}
.gauge .num{text-align:right}
img{display:block;max-width:100%;height:auto}
.pixels,.smooth{width:100%}
.pixels{image-rendering:pixelated}
.frame{width:100%;border:1px solid var(--rule);border-radius:8px;background:var(--card)}
.rows{margin:0;display:grid;gap:6px}
.row{display:grid;grid-template-columns:minmax(1.5em,max-content) 1fr;gap:14px;align-items:center}
.rows:has(.long) .row{grid-template-columns:7em 1fr}
.row dt{color:var(--muted);font-size:.875rem;font-variant-numeric:tabular-nums;text-align:right}
.row dd{margin:0;min-width:0}
figure{margin:0;min-width:0}
figcaption{margin-top:6px}
.scroll{overflow-x:auto;overscroll-behavior-x:contain;max-width:100%}
.film{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(60px,1fr);gap:10px;padding-bottom:6px}
.film figcaption{text-align:center;font-variant-numeric:tabular-nums}
.film:has(.frame){grid-auto-columns:minmax(100px,1fr)}
.pairs{display:grid;grid-template-columns:repeat(12,1fr);gap:14px 10px;margin-bottom:20px}
.pairs figcaption{text-align:center;font-variant-numeric:tabular-nums}
.scatters,.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:20px}
.charts>figure{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px}
.chart{display:block;width:100%;height:auto;font-family:inherit}
.chart text{fill:var(--muted);font-size:12px;font-variant-numeric:tabular-nums}
.chart .grid{stroke:var(--rule)}
.chart .axis{stroke:var(--muted);stroke-opacity:.6}
.chart .mark{stroke:var(--bad);stroke-opacity:.7}
.chart .band{fill:var(--band);stroke:var(--band);stroke-width:1;stroke-linejoin:round}
.chart g path{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.chart g circle{fill:var(--c)}
.line,.late{--c:var(--accent)}
.middle{--c:var(--middle)}
.early{--c:var(--early)}
.chart .middle path{stroke-width:1.5;stroke-dasharray:6 4}
.chart .early path{stroke-width:1.5;stroke-dasharray:1 4}
.hint rect{fill:transparent}
.chart .hint line{stroke:var(--muted);stroke-dasharray:2 3;visibility:hidden}
.chart .hint circle{fill:var(--ink);visibility:hidden}
.hint:hover line,.hint:hover circle{visibility:visible!important}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:8px 0 0;padding:0;color:var(--muted);
 font-size:.8125rem;font-variant-numeric:tabular-nums}
.legend i{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:6px;background:var(--c)}
table{border-collapse:collapse;width:100%;font-size:.9375rem;font-variant-numeric:tabular-nums}
.metrics th:first-child{width:38%}
.metrics th:last-child{width:38%}
th,td{text-align:left;padding:9px 20px 9px 0;border-bottom:1px solid var(--rule);vertical-align:top;
 overflow-wrap:normal}
thead th{color:var(--muted);font-weight:500;font-size:.8125rem;white-space:nowrap}
tbody th{font-weight:600}
.num{white-space:nowrap}
.refs{list-style:none;margin:0;padding:0}
.refs li{display:flex;justify-content:space-between;gap:16px}
.refs span{color:var(--muted)}
details{border-top:1px solid var(--rule);margin-top:16px}
details+details{margin-top:0}
section>details:last-child{border-bottom:1px solid var(--rule)}
.scroll+details{border-top:0;margin-top:0}
summary{cursor:pointer;padding:12px 0;font-weight:500;font-size:.9375rem}
summary:hover{color:var(--accent)}
details[open]>summary+*{margin-bottom:16px}
pre{margin:0 0 12px;padding:16px;background:var(--card);border:1px solid var(--rule);border-radius:10px;
 font:.8125rem/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
 white-space:pre-wrap;overflow-wrap:anywhere;tab-size:2}
pre .key{color:var(--accent)}
.commands code{display:block;font:inherit;padding-left:2ch;text-indent:-2ch;user-select:all;-webkit-user-select:all}
.commands code::before{content:"$ ";color:var(--muted)}
.commands code+code{margin-top:6px}
dl.protocol{display:grid;grid-template-columns:max-content 1fr;gap:4px 24px;margin:0;font-size:.875rem}
.protocol dt{color:var(--muted)}
.protocol dd{margin:0;font-variant-numeric:tabular-nums}
footer{margin-top:72px;padding-block:20px 40px;color:var(--muted);font-size:.8125rem}
@media (max-width:640px){
 body>*{padding-inline:16px}
 header{padding-top:32px}
 section{margin-top:44px}
 .tiles{grid-template-columns:1fr 1fr;gap:8px}
 .tile{padding:11px 12px}
 .tile dd{font-size:1rem}
 .lead{padding:16px}
 .lead>div{grid-template-columns:1fr}
 .row{gap:10px}
 .rows:has(.long) .row{grid-template-columns:1fr;gap:2px}
 .rows:has(.long) dt{text-align:left}
 .charts>figure{padding:12px}
 .chart text{font-size:14px}
 .pairs{grid-template-columns:repeat(6,1fr)}
 th,td{padding-right:14px}
 .refs li{display:block}
 .metrics th:first-child,.metrics th:last-child{width:auto}
 dl.protocol{grid-template-columns:1fr;gap:0}
 .protocol dd{margin-bottom:8px}
}
@media print{
 body{font-size:10.5pt;background:none}
 body>*{max-width:none;padding-inline:0}
 header{padding-top:0}
 nav,.hint{display:none}
 section{margin-top:28pt}
 h2,h3,summary{break-after:avoid}
 figure,.tile,.row,tr{break-inside:avoid}
 .scroll{overflow:visible}
 .film{grid-auto-columns:minmax(0,1fr)!important;gap:4px}
 .charts,.scatters{grid-template-columns:1fr 1fr;gap:8pt}
 .rows,section>.pixels{max-width:60%}
 .film figcaption{font-size:7pt}
 details::details-content{content-visibility:visible!important;block-size:auto!important;display:block!important}
 img,.chart,i{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""

STYLE = f"{_variables(LIGHT)}\n@media screen and (prefers-color-scheme:dark){{{_variables(DARK)}}}{_RULES}"
