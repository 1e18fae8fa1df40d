"""Pascal VOC's and YOLO's annotations to COCO's."""
