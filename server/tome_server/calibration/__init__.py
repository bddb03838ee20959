"""What is measured before it is relied on: latencies, quality, threads and dtype, schedules."""
