"""The pipeline: the plan (stages as a graph), the content-addressed cache, the worker process, the export."""
