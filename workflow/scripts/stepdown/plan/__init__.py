"""What names, schedule and configuration ask for; who may run. Without torch."""
