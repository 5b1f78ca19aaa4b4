"""The page's style: light and dark as the reader's system has it, wide and narrow."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d5dae0;
  --band: #f4f6f8; --link: #0b5cad; --c0: #0b6bb8; --c1: #bf4b00; --c2: #08775a; --c3: #a03c7c;
  --c4: #7a6200; --c5: #5a4fcf; --c6: #a31d1d; --c7: #4d5560; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e6e9ed; --soft: #a3adb8;
  --line: #3a424c; --band: #1e242b; --link: #79b8ff; --c0: #6bb5ff; --c1: #ff9b57; --c2: #45d0a0;
  --c3: #f08ac6; --c4: #d9c44a; --c5: #aca2ff; --c6: #ff8585; --c7: #c3cad2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1rem clamp(.75rem, 3vw, 2.5rem) 3rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .25rem; }
p { max-width: 46rem; color: var(--soft); margin: .5rem 0; overflow-wrap: anywhere; }
a { color: var(--link); }
nav ul, .legend { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: .25rem 1.25rem; }
li { overflow-wrap: anywhere; min-width: 0; }
.legend { margin: .5rem 0 1.25rem; }
details { margin-top: .75rem; }
.swatch { width: 1.5rem; height: .5rem; vertical-align: middle; flex: none; }
.swatch path { fill: none; stroke-width: 3; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
thead th { background: var(--band); vertical-align: bottom; white-space: normal; }
tbody th, tfoot th { font-weight: 500; position: sticky; left: 0; background: var(--paper);
  white-space: normal; min-width: 10rem; max-width: 18rem; overflow-wrap: break-word; }
@media (max-width: 40rem) { tbody th, tfoot th { min-width: 6rem; max-width: 9rem; }
  th, td { padding: .3rem .4rem; } }
td:not(.n) { white-space: normal; min-width: 6rem; max-width: 22rem; }
tfoot th, tfoot td { font-weight: 600; }
.n { text-align: right; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.25rem; }
.masks { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 11rem), 1fr));
  gap: 1rem; }
figure { margin: 0; min-width: 0; }
.charts figcaption { font-weight: 600; }
.charts svg { width: 100%; height: auto; stroke-linejoin: round; }
.masks img { width: 100%; aspect-ratio: 1; background: #fff;
  border: 1px solid var(--line); }
.masks figcaption { font-size: .8rem; overflow-wrap: anywhere; color: var(--soft); }
code { white-space: nowrap; }
summary { cursor: pointer; padding: .25rem 0; color: var(--link); }
.missing { border-left: 3px solid var(--c1); padding-left: .75rem; }
@media print { .scroll { overflow: visible; } }
"""
