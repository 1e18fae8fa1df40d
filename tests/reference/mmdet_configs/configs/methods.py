_base_ = ["base/detector.py", "base/data.py"]
model = _base_.model
model.backbone.update(dict(norm_cfg=dict(type="GN"), depth=18), frozen=1)
model.pop("kept")
model.pop("absent")
model.head["loss"] = dict(type="Focal", inner=[dict(a=1)])
model.head.loss.inner[0].a = 2
model.size = _base_.size
plain = dict(a=dict(b=1, c=2), d=1)
other = plain.copy()
plain.update(dict(a=dict(b=3)))
popped = plain.pop("d") + plain.pop("none", 5)
found = (plain.get("zz"), plain.get("zz", 2), _base_.get("size"))
steps = _base_.train_steps
steps.insert(1, dict(type="Crop"))
steps.append(1)
steps.extend((2, 3))
last = steps.pop()
shared = [0]
_base_.loader.shared = shared
shared.append(1)
inner = _base_.loader.shared
inner.append(2)
twin = model.neck.copy()
twin.channels.append(7)
twin.norm_cfg.eps = 1e-3
del _base_.model
