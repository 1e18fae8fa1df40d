"""Faster R-CNN: models, training engine, evaluation and reporting."""
