"""The tables of BENCHMARKS.md: each makes Markdown of one result, or of several of a kind."""
