"""What happens to the output when a feature is switched off or turned up, against controls matched to it."""
