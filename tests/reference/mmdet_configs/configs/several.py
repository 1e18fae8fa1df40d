_base_ = ["base/detector.py", "./base/data.py", "base/../base/schedule.py"]
model = dict(backbone=dict(depth=101), head=dict(loss=dict(weight=2.0), extra=(1,)), new=dict(_delete_=True, b=[{}]))
loader = dict(batch_size=4)
__hidden = 1
