/* One kernel, in PTX, which any driver compiles for the GPU that there is. */
#ifndef MESH_COPY_ROWS_H
#define MESH_COPY_ROWS_H

enum { UNIT_BYTES = 16 };

/* copy_rows(to, from, units, permit, wanted): so many units, a thread for each, over and over; none
 * where `permit` is not NULL and the 64 bits there are not `wanted`. */
static const char COPY_ROWS[] =
    ".version 7.0\n"
    ".target sm_70\n"
    ".address_size 64\n"
    ".visible .entry copy_rows(\n"
    "  .param .u64 to, .param .u64 from, .param .u64 units, .param .u64 permit, .param .u64 wanted)\n"
    "{\n"
    "  .reg .pred %none, %other, %past;\n"
    "  .reg .b32 %block, %threads, %thread, %blocks, %a, %b, %c, %d;\n"
    "  .reg .b64 %permit, %said, %wanted, %unit, %step, %units, %to, %from, %at, %source, %target;\n"
    "  ld.param.u64 %permit, [permit];\n"
    "  setp.eq.u64 %none, %permit, 0;\n"
    "  @%none bra COPY;\n"
    "  ld.volatile.global.u64 %said, [%permit];\n"
    "  ld.param.u64 %wanted, [wanted];\n"
    "  setp.ne.u64 %other, %said, %wanted;\n"
    "  @%other bra END;\n"
    "COPY:\n"
    "  mov.u32 %block, %ctaid.x;\n"
    "  mov.u32 %threads, %ntid.x;\n"
    "  mov.u32 %thread, %tid.x;\n"
    "  mov.u32 %blocks, %nctaid.x;\n"
    "  mul.wide.u32 %unit, %block, %threads;\n"
    "  cvt.u64.u32 %at, %thread;\n"
    "  add.u64 %unit, %unit, %at;\n"
    "  mul.wide.u32 %step, %blocks, %threads;\n"
    "  ld.param.u64 %units, [units];\n"
    "  ld.param.u64 %to, [to];\n"
    "  ld.param.u64 %from, [from];\n"
    "NEXT:\n"
    "  setp.ge.u64 %past, %unit, %units;\n"
    "  @%past bra END;\n"
    "  shl.b64 %at, %unit, 4;\n"
    "  add.u64 %source, %from, %at;\n"
    "  add.u64 %target, %to, %at;\n"
    "  ld.global.v4.u32 {%a, %b, %c, %d}, [%source];\n"
    "  st.global.v4.u32 [%target], {%a, %b, %c, %d};\n"
    "  add.u64 %unit, %unit, %step;\n"
    "  bra NEXT;\n"
    "END:\n"
    "  ret;\n"
    "}\n";

#endif
