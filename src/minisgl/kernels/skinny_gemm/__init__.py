"""Matrix products with few rows of activations, fused with their neighbours."""
