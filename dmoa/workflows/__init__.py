"""What commands and jobs both run: serving, training and evaluation put together."""
