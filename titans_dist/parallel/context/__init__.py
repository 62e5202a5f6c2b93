"""Context parallelism: every process of a group holds a share of each sequence, one after the other.

What looks back over the border of two shares is exchanged here, and nothing else is. A convolution needs the last
tokens before the share, a window of attention its keys and values: they are known at once, and cross in one message
(`exchange`). A memory needs what all tokens before have made of it, which is not. Three exact ways across:

* `heads`: trade shares of sequences for shares of heads, and back. Any memory, as many processes as heads.
* `ring`: hand the state on, in groups that follow each other like a wave. Any memory, any number of heads.
* `scan`: compose the maps of whole shares before the state is known. Memories whose chunks are affine maps.

A model says nothing of it: `split_model_along_context` gives the layers of one process their other forms.
"""

from titans_dist.parallel.context.group import split_along_context
from titans_dist.parallel.context.layers import split_model_along_context

__all__ = ["split_along_context", "split_model_along_context"]
