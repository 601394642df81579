"""Tables of BENCHMARKS.md: each function formats one result, or several of a kind, as Markdown."""
