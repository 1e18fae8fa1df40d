"""Operators: boxes, NMS, RoIAlign, matching, convolutions; backend.py decides which implementation runs."""
