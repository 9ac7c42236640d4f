"""A cache over steps that forecasts the noise a model sees, and goes by the error of its own forecasts."""
