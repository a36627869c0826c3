"""The steps of the methods on one layer `y = x W` in float64 NumPy, each written from its published formula.

A layer is a pair of functions: the weight that its parts make, and the gradients of the parts for the gradient G of
that weight. An optimizer is a function that returns `step(parts, gradients)`.
"""

import numpy as np
import scipy.linalg

RATE, B1, B2, EPS, DECAY, CLIP = 0.05, 0.9, 0.999, 1e-3, 0.1, 0.5
SCALE = 1.5


def lora(frozen, start):
    """`W + s (A B - A0 B0)`."""

    def weight(p):
        return frozen + SCALE * (p["lora_a"] @ p["lora_b"] - start)

    def gradients(p, g):
        return {"lora_a": SCALE * g @ p["lora_b"].T, "lora_b": SCALE * p["lora_a"].T @ g}

    return weight, gradients


def dora(frozen, start):
    """`m_j V_j / ||V_j||`, the norm a constant."""
    direction, of_pair = lora(frozen, start)

    def weight(p):
        v = direction(p)
        return p["magnitude"] * v / np.linalg.norm(v, axis=0)

    def gradients(p, g):
        v = direction(p)
        norms = np.linalg.norm(v, axis=0)
        return of_pair(p, g * p["magnitude"] / norms) | {"magnitude": (g * v / norms).sum(0)}

    return weight, gradients


def svd_layer(frozen, start):
    """`W + s P diag(E) Q`."""

    def weight(p):
        return frozen + SCALE * p["lora_a"] @ np.diag(p["lora_e"]) @ p["lora_b"]

    def gradients(p, g):
        e = np.diag(p["lora_e"])
        inner = np.diag(p["lora_a"].T @ g @ p["lora_b"].T)
        return {
            "lora_a": SCALE * g @ p["lora_b"].T @ e,
            "lora_b": SCALE * e @ p["lora_a"].T @ g,
            "lora_e": SCALE * inner,
        }

    return weight, gradients


def full(frozen, start):
    """The weight itself."""
    return lambda p: p["kernel"], lambda p, g: {"kernel": g}


def clipped(make):
    """The optimizer behind the clip of the norm of all gradients together."""

    def build():
        inner = make()

        def step(p, g):
            norm = np.sqrt(sum(np.sum(x**2) for x in g.values()))
            return inner(p, {name: x * min(1, CLIP / norm) for name, x in g.items()})

        return step

    return build


class Adam:
    """Adam's moments; called with gradients it gives the directions."""

    def __init__(self, eps=EPS):
        self.eps, self.t, self.m, self.v = eps, 0, {}, {}

    def update(self, g):
        self.t += 1
        for name, x in g.items():
            self.m[name] = B1 * self.m.get(name, 0) + (1 - B1) * x
            self.v[name] = B2 * self.v.get(name, 0) + (1 - B2) * x**2

    def __call__(self, g):
        self.update(g)
        mean, square = 1 - B1**self.t, 1 - B2**self.t
        return {name: self.m[name] / mean / (np.sqrt(self.v[name] / square) + self.eps) for name in g}


def adamw(adjust=lambda p, g: g, *, eps=EPS, ratio=1.0, scale=1.0):
    """AdamW of adjusted gradients; `ratio` multiplies B's steps, `scale` the direction of Adam."""

    def build():
        adam = Adam(eps)

        def step(p, g):
            d = adam(adjust(p, g))
            rates = {name: RATE * (ratio if name == "lora_b" else 1) for name in p}
            return {name: x - rates[name] * (scale * d[name] + DECAY * x) for name, x in p.items()}

        return step

    return build


def descent(adjust=lambda p, g: g):
    def build():
        return lambda p, g: {name: p[name] - RATE * x for name, x in adjust(p, g).items()}

    return build


def grams(p):
    return p["lora_a"].T @ p["lora_a"], p["lora_b"] @ p["lora_b"].T


def by_partners_gram(p, g, damping=1e-6):
    gram_a, gram_b = (gram + damping * np.eye(len(gram)) for gram in grams(p))
    return g | {"lora_a": g["lora_a"] @ np.linalg.inv(gram_b), "lora_b": np.linalg.inv(gram_a) @ g["lora_b"]}


def by_geometric_mean(p, g):
    """`S Q S = P` for `P = A^T A`, `Q = B B^T`."""
    gram_a, gram_b = grams(p)
    root = scipy.linalg.sqrtm(gram_b)
    inverse = np.linalg.inv(root)
    s = inverse @ scipy.linalg.sqrtm(root @ gram_a @ root) @ inverse
    np.testing.assert_allclose(s @ gram_b @ s, gram_a, atol=1e-9)
    return g | {"lora_a": g["lora_a"] @ s, "lora_b": np.linalg.inv(s) @ g["lora_b"]}


def by_projection(p, g):
    """LoRA-Pro, with the Sylvester equation solved densely."""
    a, b, (gram_a, gram_b) = p["lora_a"], p["lora_b"], grams(p)
    inverse_a, inverse_b = np.linalg.inv(gram_a), np.linalg.inv(gram_b)
    x = scipy.linalg.solve_sylvester(gram_a, gram_b, -(SCALE**-2) * inverse_a @ g["lora_b"] @ b.T)
    h_a = SCALE**-2 * (np.eye(len(a)) - a @ inverse_a @ a.T) @ g["lora_a"] @ inverse_b - a @ x
    return g | {"lora_a": h_a, "lora_b": SCALE**-2 * inverse_a @ g["lora_b"] + x @ b}


def reflora_s():
    adam = Adam()

    def step(p, g):
        d = adam(g)
        p = {name: x - RATE * (d[name] + DECAY * x) for name, x in p.items()}
        ratio = np.sqrt(np.linalg.norm(p["lora_b"]) / np.linalg.norm(p["lora_a"]))
        for name, r in (("lora_a", ratio), ("lora_b", 1 / ratio)):
            p[name], adam.m[name], adam.v[name] = r * p[name], adam.m[name] / r, adam.v[name] / r**2
        return p

    return step


def lora_rite(eps=1e-6):
    moments = {}

    def bases(p):
        found = []
        for x in (p["lora_a"], p["lora_b"].T):
            u = np.linalg.svd(x, full_matrices=False)[0]
            found.append((u, u.T @ x))
        return found

    def step(p, g):
        t = moments["t"] = moments.get("t", 0) + 1
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in (B1, B2))
        sides, gradients = [p["lora_a"], p["lora_b"].T], [g["lora_a"], g["lora_b"].T]
        found = bases(p)
        h = [gradients[i] @ np.linalg.pinv(found[1 - i][1]) for i in (0, 1)]
        h = [np.where(np.sqrt(np.mean(x**2)) > 1, 0, x) for x in h]
        h = [x / max(1, np.sqrt(sum(np.sum(y**2) for y in h))) for x in h]
        new = []
        for i in (0, 1):
            basis, triangle = found[1 - i]
            turn = basis.T @ moments["bases"][1 - i][0] if t > 1 else np.eye(len(triangle))
            first, second = moments.get(i, (np.zeros_like(h[i]), np.zeros_like(turn)))
            second = b2 * turn @ second @ turn.T + (1 - b2) * h[i].T @ h[i] / len(h[i])
            w, v = np.linalg.eigh(second)
            first = b1 * first @ turn.T + (1 - b1) * h[i] @ v @ np.diag(1 / (np.sqrt(np.maximum(w, 0)) + eps)) @ v.T
            moments[i] = first, second
            new.append(sides[i] - RATE * (first @ np.linalg.pinv(triangle).T + DECAY * sides[i]))
        moments["bases"] = found
        return {"lora_a": new[0], "lora_b": new[1].T}

    return step


def loro(period=2, eps=1e-6):
    adam = Adam()

    def step(p, g):
        adam.update(g)
        rate = RATE * np.sqrt(1 - B2**adam.t) / (1 - B1**adam.t)
        d = {name: adam.m[name] / (np.sqrt(adam.v[name]) + eps) for name in p}
        if adam.t % period:
            return {name: (1 - rate * DECAY) * (x - rate * d[name]) for name, x in p.items()}
        a, b = p["lora_a"], p["lora_b"]
        (q_a, r_a), (q_b, r_b) = np.linalg.qr(a), np.linalg.qr(b.T)
        f, e = d["lora_a"] @ np.linalg.inv(r_b), np.linalg.inv(r_a).T @ d["lora_b"]
        tangent = f @ q_b.T + q_a @ e @ (np.eye(b.shape[1]) - q_b @ q_b.T)
        u, s, vt = np.linalg.svd(a @ b - rate * tangent)
        root = np.sqrt(s[: a.shape[1]])
        return {"lora_a": u[:, : root.size] * root, "lora_b": root[:, None] * vt[: root.size]}

    return step


def galore(rank=2):
    """Of a tall matrix, in the directions of its first gradient."""
    adam, basis = Adam(1e-6), []

    def step(p, g):
        if not basis:
            basis.append(np.linalg.svd(g["kernel"])[2][:rank].T)
        d = adam({"kernel": g["kernel"] @ basis[0]})["kernel"] @ basis[0].T
        return {"kernel": p["kernel"] - RATE * (0.25 * d + DECAY * p["kernel"])}

    return step


def adalora(total=2, target=1, beta=0.85, gamma=0.5):
    """A choice after every step; the last has the target budget and the scores of the one before."""
    inner, smooth, spread, count = clipped(adamw())(), {}, {}, [0]

    def slope(f):
        residual = f.T @ f - np.eye(f.shape[1])
        return gamma / 2 * 2 * f @ residual / np.linalg.norm(residual)

    def step(p, g):
        count[0] += 1
        t = count[0]
        g = g | {"lora_a": g["lora_a"] + slope(p["lora_a"]), "lora_b": g["lora_b"] + slope(p["lora_b"].T).T}
        if t < total:
            for name in p:
                now = np.abs(p[name] * g[name])
                smooth[name] = beta * smooth.get(name, 0) + (1 - beta) * now
                spread[name] = beta * spread.get(name, 0) + (1 - beta) * np.abs(now - smooth[name])
        s = {name: smooth[name] * spread[name] for name in p}
        score = s["lora_e"] + s["lora_a"].mean(0) + s["lora_b"].mean(1)
        budget = int(target + (len(score) - target) * (1 - t / total) ** 3)
        p = inner(p, g)
        p["lora_e"][np.argsort(-score)[budget:]] = 0
        return p

    return step
