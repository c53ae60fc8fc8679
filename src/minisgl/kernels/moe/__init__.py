"""A layer's mixture of experts, from router logits to the weighted sum."""
