"""Build data sets: videos, annotations and detections in, ArrayRecord files out."""
