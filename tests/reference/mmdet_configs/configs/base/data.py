data_root = "data/set/"
size = (1333, 800)
backend = None
train_steps = [dict(type="Load", backend=backend), dict(type="Resize", scale=size), dict(type="Pack")]
loader = dict(batch_size=2, dataset=dict(root=data_root, steps=train_steps, splits=("train", "val")))
