"""Reports from records of measurements, and comparisons of two sets of them: HTML, Markdown and JSON."""
