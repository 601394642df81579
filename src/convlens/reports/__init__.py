"""Self-contained HTML pages about one run, or about several side by side.

`contents` gathers the files of a run, `sections` and `compare` render the named parts of a page,
`html` composes them into one file, and `build` does the whole job. A new part of the page is a
function and an entry in `sections.SECTIONS` (one run) or `compare.COMPARE_SECTIONS` (several).
"""
