"""QK-norm, rotary embedding and KV store fused, straight from the output of the QKV product."""
