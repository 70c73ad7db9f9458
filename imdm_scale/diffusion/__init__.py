"""The mathematics of masked diffusion with infinite masks, on plain tensors (torch and nothing else).

Where to find what:

- `noise.py`: counter-based random numbers (Philox4x32-10) and the mask's noise e
- `schedule.py`: alpha(t), the NELBO's weight, and how the times t of a batch are drawn
- `corruption.py`: the forward process q(x_t | x_0)
- `posterior.py`: the three-way reverse posterior (reveal, keep e, redraw e)
- `sampler.py`: few-step generation, from all masks or around given tokens
- `inverse_cdf.py`: one token from logits and one uniform, with temperature and nucleus
- `vocabulary_order.py`: orders of the tokens other than that of ids, for the inverse CDF to run through
- `likelihood.py`: the forbidden mask id, cross-entropy, the NELBO
- `divergence.py`: KL both ways, Jensen-Shannon, total variation, squared error, with exact gradients
- `targets.py`: IM-SDTT's two teacher sub-steps
- `coupling.py`: the noise as the sampler's randomness: trajectories, labels and states that are functions of e
- `fourier.py`: Fourier features by which a network can read that randomness
- `vocabulary.py`: sums and maxima over a vocabulary that may be cut over processes

Nothing is re-exported here: import from the file that holds the idea.
"""
