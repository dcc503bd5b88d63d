"""Ways to run a model over a text and the branches that hang off it; all give equal hidden states.

- [`shared_prefix`] (fast): the text runs once, and every branch attends to it and to itself.
- [`masked_prefix`]: the shared prefix by a 4D mask, for families whose attention does not come by Transformers' interface.
- [`cached_replay`]: sampling goes on from copies of the family's own cache; scoring is replayed.
- [`replay`] (universal, and the oracle): every branch is run as an ordinary sequence.

[`base`] has what a path offers, [`memory`] how many branches run at once, and [`decoders`] what generation asks of a path.
"""
