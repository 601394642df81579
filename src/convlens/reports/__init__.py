"""One self-contained HTML page about a run, or about several side by side.

`contents` gathers what a run folder knows, `sections` turns it into a table of named parts,
`page` puts them into one file, `building` is the whole job. A new part of the page is a function
and a line in `sections.SECTIONS` (one run) or `comparing.SECTIONS` (several).
"""
