"""What the services of Expert Mesh share, and nothing else."""
