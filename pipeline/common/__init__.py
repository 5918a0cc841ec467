"""What every package of the pipeline stands on."""
