"""Pages and pictures of what the pipeline found."""
