# The only place where warning flags and instruction-set flags are handed out.

function(kvpack_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Werror)
endfunction()

# The instructions that multiply bytes of keys, of values, and look levels up, as regular expressions.
set(kvpack_avx2_instructions vpmaddubsw vpmaddubsw vpshufb)
set(kvpack_avx_vnni_instructions vpdpbusd vpdpbusd vpshufb)
set(kvpack_avx512_vnni_instructions vpdpbusd vpdpbusd vpshufb)
set(kvpack_avx512_vbmi_instructions vpdpbusd vpdpbusd "vperm(b|[it]2b)")
set(kvpack_neon_instructions "smull2?" "umull2?" "tb[lx]")
set(kvpack_neon_dotprod_instructions sdot udot "tb[lx]")

# kvpack_add_isa(name flags...): compiles csrc/isa/<name>.cpp with those flags, and nothing else with them. In test
# builds, a test fails when the object exports a weak symbol: the linker could pick it for a machine without the ISA.
function(kvpack_add_isa name)
  add_library(isa_${name} OBJECT csrc/isa/${name}.cpp)
  target_include_directories(isa_${name} PRIVATE csrc)
  # Units are large. Those that are sanitized, or emulated but for KVPACK_TEST_ALL, are optimized less.
  set(optimize -O3)
  if(KVPACK_SANITIZE OR (CMAKE_CROSSCOMPILING AND KVPACK_TESTS AND NOT KVPACK_TEST_ALL))
    set(optimize -O1)
  endif()
  target_compile_options(isa_${name} PRIVATE ${ARGN} ${optimize} -ffp-contract=off -fno-math-errno -fno-exceptions -fno-rtti)
  # Names and lines for profiles and backtraces, but no variables: with those, a unit takes twice as long to compile.
  target_compile_options(isa_${name} PRIVATE $<$<CONFIG:RelWithDebInfo>:-g1>)
  kvpack_warnings(isa_${name})
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # False alarms inside the AVX-512 headers of GCC 12.
    target_compile_options(isa_${name} PRIVATE -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
  if(KVPACK_SANITIZE)
    # ASan and UBSan both emit weak helpers; the weak-symbol test belongs to ordinary builds. Checks are calls, not
    # inline code; those that ASan makes redundant are left out; arrays on the stack are left to UBSan's bounds, except
    # with KVPACK_TEST_ALL: a unit compiles in 40 s instead of minutes.
    target_compile_options(isa_${name} PRIVATE -fsanitize=address,undefined -fno-sanitize-recover=all
      -fno-sanitize=null,alignment,object-size,pointer-overflow)
    if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
      target_compile_options(isa_${name} PRIVATE --param asan-instrumentation-with-call-threshold=0)
      if(NOT KVPACK_TEST_ALL)
        target_compile_options(isa_${name} PRIVATE "SHELL:--param asan-stack=0")
      endif()
    endif()
  elseif(KVPACK_TESTS)
    if(NOT name STREQUAL "scalar")
      add_test(NAME isa_${name}_instructions
        COMMAND "${CMAKE_SOURCE_DIR}/tests/cpp/instructions.sh" "${CMAKE_OBJDUMP}" "$<TARGET_OBJECTS:isa_${name}>"
          ${kvpack_${name}_instructions})
    endif()
    if(optimize STREQUAL "-O3")  # with less, constants of the headers remain, which are weak
      # nm apart from grep: where nm fails, or finds no table, the test must fail too.
      add_test(NAME isa_${name}_has_no_weak_symbols
        COMMAND sh -c "symbols=$('${CMAKE_NM}' -C --defined-only '$<TARGET_OBJECTS:isa_${name}>') && echo \"$symbols\" | grep -qE 'k(Table|Readers)_${name}' && ! echo \"$symbols\" | grep -E ' [WVu] '")
    endif()
  endif()
  target_sources(kvpack_core PRIVATE $<TARGET_OBJECTS:isa_${name}>)
  target_compile_definitions(kvpack_core PRIVATE KVPACK_LEVEL_${name})
endfunction()
