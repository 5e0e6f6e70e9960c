"""One HTML page about what a database holds. ``page.render(records, source)`` makes it; the rest is what it shows."""
