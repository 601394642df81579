"""`convlens explore`: a local page to try, inspect and correct models.

Each part of the page is a module with its routes, a template, and an ES module in `static/`; a line
in `server.PARTS` adds it. No module of this package imports torch when it is imported, so that the
page is shown before torch is loaded.
"""
