depths = [2, 6]
keys = {f"stage.{i}.block.{j}": dict(decay=0.5**i) for i, n in enumerate(depths) for j in range(n - i)}
keys.update({f"{name!r:>6}-{i:02d}": i for i, name in enumerate(("a", "b"), start=len(depths))})
squares = [[x, x * 2 ** (1 / 2)] for x in [32, 64]]
nested = [[y + x for y in range(x)] for x in depths]
pairs = dict((k, v) for k, v in [("p", 1), ("q", (2,))])
members = {n % 3 for n in range(7)}
every = [(k, v) for k, v in pairs.items()] + [k for k in pairs] + [v for v in pairs.values()]
letters = [c for c in "abc"]
phrase = f"{depths[0]}/{1.5:.3f}{{}}" "joined"
