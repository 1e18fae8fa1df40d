_base_ = ["base/data.py", "base/detector.py"]
root = {{_base_.data_root}}
steps = [dict(type="First"), {{ _base_.loader.dataset.steps }}, ({{_base_.size}},)]
loader = dict(dataset=dict(root="other/", twin={{_base_.loader.dataset.splits}}, none={{_base_.backend}}))
copied = {{_base_.model.head}}
again = root
model = dict(neck={{_base_.norm}})
