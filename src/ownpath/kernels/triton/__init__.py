"""Triton kernels. Each module imports triton itself: nothing here is imported before a plan asks for it.

Small operations, each with the signature of its torch twin in ``kernels/ref``, plus what is named here:
    hyper.hyper_boundary(x_TSD, y_TD, mix, weights, out=None, workspace=None) -> HyperOut     twin: ref.hyper
    hyper.hyper_boundary_invariant(...)                                                       the same, batch-invariant
        out: hyper.new_out(x_TSD, with_mix); workspace: float32 [hyper.num_workspace_floats(T, D)]
    small.router(logits_TE, num_experts_per_tok, routed_scaling_factor, bias_E, token_ids_T, tid2eid_VK, out)
        -> (ids int64 [T, K], or int32 where out asks for it; weights float32 [T, K])         twin: ref.small
    small.rms_norm(x, weight_D, eps, out=None), rows of x may be strided                      twin: ref.small
    small.swiglu(gate_up, limit, out=None)                                                    twin: ref.small
    grouped.rope_grouped_linear(o_TNH, cos_TA, sin_TA, weight_GRI, out=None) -> [T, G, R]     twin: ref.small
All are deterministic, capturable in a CUDA graph, and allocate nothing when their outputs and workspace are given.
"""
