"""Images to detections on disk: prediction, test-time augmentation, drawing, outputs."""
