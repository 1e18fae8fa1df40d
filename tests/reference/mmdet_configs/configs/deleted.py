_base_ = ["base/detector.py", "base/data.py"]
temporary = range(3)
numbers = [n for n in temporary]
del temporary, _base_.loader, _base_.model.head["loss"], numbers[0]
del _base_.norm
