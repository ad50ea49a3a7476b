"""The training loop and what it stands on; knows neither files nor terminals."""
