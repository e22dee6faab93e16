"""What many runs of `lora train` and `gen train` were: listing, comparing and following them."""
