"""Small programs in HLO text as XLA prints it, for the reader's tests."""

# A loop of five products, whose length is known from its condition, and around it a loop that tells its length itself.
LOOPS = """HloModule jit_step, is_scheduled=true

%fused (p.0: f32[5,8,16], p.1: s32[], p.2: f32[4,8]) -> f32[4,16] {
  %p.2 = f32[4,8]{1,0} parameter(2)
  %p.0 = f32[5,8,16]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice.1 = f32[1,8,16]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %bitcast.1 = f32[8,16]{1,0} bitcast(%slice.1)
  ROOT %dot.1 = f32[4,16]{1,0} dot(%p.2, %bitcast.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%condition (c.0: (s32[], f32[4,8], f32[5,8,16])) -> pred[] {
  %c.0 = (s32[], f32[4,8]{1,0}, f32[5,8,16]{2,1,0}) parameter(0)
  %limit = s32[] constant(5)
  %i.0 = s32[] get-tuple-element(%c.0), index=0
  ROOT %less = pred[] compare(%i.0, %limit), direction=LT
}

%body (b.0: (s32[], f32[4,8], f32[5,8,16])) -> (s32[], f32[4,8], f32[5,8,16]) {
  %b.0 = (s32[], f32[4,8]{1,0}, /*index=2*/f32[5,8,16]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%b.0), index=0
  %x.1 = f32[4,8]{1,0} get-tuple-element(%b.0), index=1
  %w.1 = f32[5,8,16]{2,1,0} get-tuple-element(%b.0), index=2
  %product = f32[4,16]{1,0} fusion(%w.1, %i.1, %x.1), kind=kOutput, calls=%fused
  ROOT %tuple.1 = (s32[], f32[4,8]{1,0}, f32[5,8,16]{2,1,0}) tuple(%i.1, %x.1, %w.1)
}

%outer_condition (d.0: (s32[], f32[4,8], f32[5,8,16])) -> pred[] {
  %d.0 = (s32[], f32[4,8]{1,0}, f32[5,8,16]{2,1,0}) parameter(0)
  ROOT %flag = pred[] custom-call(%d.0), custom_call_target="x"
}

%outer_body (e.0: (s32[], f32[4,8], f32[5,8,16])) -> (s32[], f32[4,8], f32[5,8,16]) {
  %e.0 = (s32[], f32[4,8]{1,0}, f32[5,8,16]{2,1,0}) parameter(0)
  ROOT %inner = (s32[], f32[4,8]{1,0}, f32[5,8,16]{2,1,0}) while(%e.0), condition=%condition, body=%body
}

ENTRY %main (a.0: (s32[], f32[4,8], f32[5,8,16])) -> (s32[], f32[4,8], f32[5,8,16]) {
  %a.0 = (s32[], f32[4,8]{1,0}, f32[5,8,16]{2,1,0}) parameter(0)
  ROOT %outer = (s32[], f32[4,8]{1,0}, f32[5,8,16]{2,1,0}) while(%a.0), condition=%outer_condition, body=%outer_body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""

# What a kernel says of itself goes over several lines, one of which begins with a brace.
KERNEL = """HloModule jit_step

ENTRY %main (q.0: bf16[2,40,256,128], k.0: bf16[2,40,512,128]) -> bf16[2,40,256,128] {
  %q.0 = bf16[2,40,256,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k.0 = bf16[2,40,512,128]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %splash_mha_fwd_residuals.2 = (f32[2,256,128]{2,1,0}, bf16[2,40,256,128]{3,2,1,0}) custom-call(%q.0, %k.0, %k.0), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024}"
}}, metadata={op_name="jit(step)/pallas_call"}
  %norm_rope.1 = bf16[2,40,256,128]{3,2,1,0} custom-call(%q.0), custom_call_target="tpu_custom_call"
  ROOT %out = bf16[2,40,256,128]{3,2,1,0} get-tuple-element(%splash_mha_fwd_residuals.2), index=1
}
"""


def convolution(inputs: str, weights: str, output: str, attributes: str) -> str:
    """A program of one convolution."""
    return f"""HloModule m

ENTRY %main (x: {inputs}, w: {weights}) -> {output} {{
  %x = {inputs} parameter(0)
  %w = {weights} parameter(1)
  ROOT %y = {output} convolution(%x, %w), {attributes}
}}
"""


def collectives(*lines: str) -> str:
    """A program of `lines`, which take %x, f32[1024,1024], and %w, f32[1024,1024]."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"""HloModule m

ENTRY %main (x: f32[1024,1024], w: f32[1024,1024]) -> f32[1024,1024] {{
  %x = f32[1024,1024]{{1,0}} parameter(0)
  %w = f32[1024,1024]{{1,0}} parameter(1)
{body}
  ROOT %end = f32[1024,1024]{{1,0}} copy(%x)
}}
"""
