"""The main job in 30 seconds: four disks under load, one of them hangs, the others go on. And how it would be else."""
