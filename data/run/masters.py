"""A training step's weights in bf16 on one GPU, with fp32 master weights beside them.

Autocast casts each weight to bf16 in each forward, and its gradient back to fp32. Experts are most
of a sparse model, and all of them pass through memory in a step, however few a token is sent to. So
the weights that Muon trains, which are used in products of matrices alone, are in bf16 themselves,
with gradients and momenta: 2% less time (32 experts of 512, one H100), and less memory. Small steps
would be lost in the 8 bits of bf16: they add up in fp32 masters (Micikevicius et al. 2017,
arXiv:1710.03740). The pass that moves these also rounds them to the model's weights.
"""

import torch


class Masters:
    """Muon's move for a model in bf16, whose state_dict() gives the masters from then on. A
    state_dict is loaded before this, into fp32."""

    def __init__(self, model, muon):
        self.plain, self.move = muon.move, torch.compile(self.move, dynamic=False)
        self.of = {w: w.detach().clone() for group in muon.param_groups for w in group["params"]}
        for weight in self.of:
            weight.data = weight.data.bfloat16()
        for state in muon.state.values():  # of a run that goes on: it was loaded as fp32
            state["momentum"] = state["momentum"].bfloat16()
        muon.move = self

        def give_masters(model, state, prefix, metadata):
            named = model.named_parameters(prefix.rstrip("."))
            state.update({name: self.of[weight] for name, weight in named if weight in self.of})

        model.register_state_dict_post_hook(give_masters)

    def __call__(self, weights, *parts) -> None:
        self.move([self.of[weight] for weight in weights], weights, *parts)

    def move(self, masters, weights, grads, momenta, *rates) -> None:
        """Compiled, it reads and writes each number once before the products, and once after."""
        exact = [average.float() for average in momenta]
        self.plain(masters, [grad.float() for grad in grads], exact, *rates)
        for kept, new in zip((*momenta, *weights), (*exact, *masters), strict=True):
            kept.copy_(new)
